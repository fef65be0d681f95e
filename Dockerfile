# What training, inference and the page need, for a user without privileges.
#
#   docker build -t icl-moe .                              PyTorch's CPU build
#   docker build -t icl-moe --build-arg TORCH=cu130 .      its CUDA 13.0 build; run with --gpus all --shm-size 8g
#   docker build -t icl-moe --build-arg EXTRAS=web .       with an extra of pyproject.toml; docs/web.md runs the page
#   docker run --rm icl-moe icl-moe demo                   a smoke test
#
# Behind mirrors: --build-arg BASE=MIRROR/python:3.11-slim-bookworm, and --secret id=pip,src=pip.conf for pip's configuration, which
# does not stay in the image.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# Triton needs gcc and the C headers to compile its launchers at run time on GPUs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 icl && install --directory --owner icl /opt/icl-moe
USER icl
WORKDIR /opt/icl-moe
ENV PATH=/opt/icl-moe/.venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# A folder of PyTorch's package index, such as cpu or cu130. If empty, torch comes from pip's default index.
ARG TORCH=cpu
ARG EXTRAS=

# The dependencies are installed first, with almost empty packages, so that this layer stays cached while only the code changes. torch
# comes before them, so that no other package can install another build of it.
COPY --chown=icl pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=icl icl_moe/__init__.py icl_moe/
COPY --chown=icl preprocessing/__init__.py preprocessing/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,uid=1000 \
    python3 -m venv .venv \
    && .venv/bin/pip install ${TORCH:+--index-url https://download.pytorch.org/whl/${TORCH}} "$(grep '^torch==' constraints.txt)" \
    && .venv/bin/pip install --constraint constraints.txt --editable ".${EXTRAS:+[${EXTRAS}]}"
COPY --chown=icl . .

# tini passes signals to the whole process group, so that `docker stop` reaches every process of a run.
ENTRYPOINT ["tini", "-g", "--"]
CMD ["icl-moe", "--help"]
