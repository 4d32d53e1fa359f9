"""The version of seewhy."""

__version__ = "0.1.0"
