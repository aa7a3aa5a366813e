# syntax=docker/dockerfile:1
# hasten for CPUs (the last stage, so the default) and for NVIDIA GPUs (--target cuda). The CUDA libraries come with
# torch's wheels; the driver is the host's.

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
 && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > requirements.txt

FROM requirements AS requirements-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt -r requirements.txt

FROM requirements AS requirements-cuda
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt -r requirements.txt

FROM base AS wheel
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
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
WORKDIR /home/hasten
EXPOSE 8000 8001 8002
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
