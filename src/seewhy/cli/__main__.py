"""python -m seewhy.cli."""

from seewhy.cli.main import main

main()
