# A server of a mixture. With TORCH_INDEX, torch comes from the index of its builds for the CPU alone, which are far smaller:
#   docker build -t xpert --build-arg TORCH_INDEX=URL .
# For a GPU, begin from an image with CUDA's runtime, and leave it out.
#   docker build -t xpert .
#   docker run -p 8000:8000 -v ~/registry:/registry:ro -v ~/models:/models:ro xpert me/desk --base /models/base
FROM python:3.11-slim AS build
RUN python -m venv /opt/xpert
ENV PATH=/opt/xpert/bin:$PATH
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
# torch first, and alone: it is the largest layer and changes least.
ARG TORCH_INDEX=
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY toolkit toolkit
COPY commands commands
COPY selectors selectors
COPY experts experts
COPY registry registry
RUN pip install --no-cache-dir -c constraints.txt '.[serve,otel,s3,sign]'

FROM python:3.11-slim
RUN useradd --create-home --home-dir /var/lib/xpert --uid 10001 xpert
COPY --from=build /opt/xpert /opt/xpert
ENV PATH=/opt/xpert/bin:$PATH \
    OMP_WAIT_POLICY=PASSIVE \
    TOKENIZERS_PARALLELISM=false \
    PYTHONUNBUFFERED=1 \
    XPERT_REGISTRY=/registry \
    XPERT_CACHE=/var/lib/xpert/cache
USER xpert
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=15s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# SIGTERM drains: no new requests, --grace seconds for those that run.
STOPSIGNAL SIGTERM
ENTRYPOINT ["xpert", "serve", "--host", "0.0.0.0", "--port", "8000", "--access-log", "json"]
CMD ["--help"]
