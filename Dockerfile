# The same install as `make setup`, for a user without privileges.
#
#   docker build -t icl-moe .                              PyTorch's CPU build
#   docker build -t icl-moe --build-arg TORCH=cu130 .      its CUDA 13.0 build; run with --gpus all --shm-size 8g
#   docker build -t icl-moe --build-arg EXTRAS=web .       with an extra of pyproject.toml; docs/web.md runs the page
#   docker run --rm icl-moe icl-moe demo                   a smoke test
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# A folder of PyTorch's package index, such as cpu or cu130. If empty, torch comes from pip's default index.
ARG TORCH=cpu

# Triton needs gcc and the C headers to compile its launchers at run time on GPUs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev make tini \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 icl && install --directory --owner icl /opt/icl-moe
USER icl
WORKDIR /opt/icl-moe
ENV PATH=/opt/icl-moe/.venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# The dependencies are installed first, with empty packages, so that this layer stays cached while only the code changes.
COPY --chown=icl Makefile pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir icl_moe preprocessing \
    && touch icl_moe/__init__.py preprocessing/__init__.py \
    && make setup TORCH_INDEX="${TORCH:+https://download.pytorch.org/whl/${TORCH}}"
COPY --chown=icl . .

# Extras are installed without constraints.txt: Gradio needs an older Pillow than the one there.
ARG EXTRAS=
RUN if [ -n "${EXTRAS}" ]; then .venv/bin/python -m pip install --editable ".[${EXTRAS}]"; fi

# tini passes signals to the whole process group, so that `docker stop` reaches every process of a run.
ENTRYPOINT ["tini", "-g", "--"]
CMD ["icl-moe", "--help"]
