# syntax=docker/dockerfile:1
# hasten for CPUs (the last stage, so the default) and for NVIDIA GPUs (--target cuda), with the server, the cluster
# commands and the demo. The CUDA libraries come with torch's wheels; the driver is the host's.
#
#   docker run --rm IMAGE demo --output-dir /tmp/demo
#   docker run --rm -p 8000-8002:8000-8002 -v /path/to/models:/models:ro IMAGE serve /models/bloom-560m --host 0.0.0.0
#   docker run --rm --gpus all --shm-size 1g -p 8000-8002:8000-8002 -v ... IMAGE serve /models/bloom-7b1 -tp 2 --host 0.0.0.0

FROM python:3.11-slim-bookworm AS base
ENV PATH=/opt/hasten/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

# What hasten needs, without hasten: a layer that changes with pyproject.toml and constraints.txt alone.
FROM base AS requirements
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN python -m venv /opt/hasten \
 && python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; extras = project['optional-dependencies']; cpu = project['dependencies'] + extras['serve'] + extras['cluster']; print(*cpu, sep='\n', file=open('cpu.txt', 'w')); print(*cpu, *extras['gpu'], sep='\n', file=open('cuda.txt', 'w'))"

FROM requirements AS requirements-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt -r cpu.txt

FROM requirements AS requirements-cuda
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt -r cuda.txt

FROM base AS wheel
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY examples ./examples
COPY src ./src
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps -w /dist .

# mpirun starts ranks as the article does.
FROM base AS runtime
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends openmpi-bin \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 1000 hasten \
 && useradd --uid 1000 --gid 1000 --create-home hasten
LABEL org.opencontainers.image.title="hasten" \
      org.opencontainers.image.description="Inference engine and server for BLOOM language models" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /home/hasten
EXPOSE 8000 8001 8002
# Of `serve` at its own port. Other commands end by themselves; a large model may load for minutes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/v2/health/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["hasten"]
CMD ["--help"]

FROM runtime AS cuda
# Triton's kernels are linked on their first use.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=requirements-cuda /opt/hasten /opt/hasten
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps /dist/*.whl
USER 1000:1000

FROM runtime AS cpu
COPY --from=requirements-cpu /opt/hasten /opt/hasten
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps /dist/*.whl
USER 1000:1000
