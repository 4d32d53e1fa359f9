# Two images. What serves an exported file (the default; no torch in it):
#   docker build -t seewhy-serve .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs/NAME:/model:ro" seewhy-serve
# What trains, without the extras ray and captum (some GB):
#   docker build --target train -t seewhy-train .
#   docker run --rm -v "$PWD:/data" --user "$(id -u):$(id -g)" seewhy-train train images/ --backbone efficientnet_lite0
FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin seewhy
WORKDIR /seewhy

FROM base AS train
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install -c constraints.txt ".[serve,search,audit,tensorboard,mlflow]" && rm -rf src
# Whoever runs it: caches go where anybody may write.
ENV HOME=/tmp SEEWHY_CACHE=/tmp/seewhy
USER seewhy
WORKDIR /data
ENTRYPOINT ["seewhy"]
CMD ["--help"]

FROM base AS serve
COPY constraints.txt requirements-runtime.txt ./
RUN pip install -c constraints.txt -r requirements-runtime.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-deps . && rm -rf src
ENV HOME=/tmp SEEWHY_CACHE=/tmp/seewhy
USER seewhy
WORKDIR /
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["seewhy", "serve", "/model/model.onnx", "--host", "0.0.0.0", "--port", "8000"]
