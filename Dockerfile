# syntax=docker/dockerfile:1
# One image for every torchord process: training server, Clients, Flower, TensorBoard, submitters.
#
#   docker build -t torchord .                                    torch for the CPU (small)
#   docker build -t torchord:cuda --build-arg TORCH_INDEX= .      torch with CUDA (PyPI's own Linux build)
#
# Any other index that carries the pinned torch version will do, for another CUDA version or ROCm.
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# torch alone first: the largest layer changes only with constraints.txt.
COPY constraints.txt /src/
RUN pip install -c /src/constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch

COPY pyproject.toml README.md LICENSE /src/
COPY torchord /src/torchord
COPY cache /src/cache
COPY coordinator /src/coordinator
COPY tasks /src/tasks
RUN pip install -c /src/constraints.txt "/src[demo,tensorboard]" && rm -rf /src

# A worker imports recipes from what lies under the directory that it is started in: add your own
# code here, with a bind mount or with an image built FROM this one.
RUN useradd --create-home --uid 10001 torchord \
    && install -d -o torchord -g torchord /app /var/lib/torchord/checkpoints /var/lib/torchord/tensorboard
WORKDIR /app
COPY --chown=torchord:torchord examples /app/examples
USER torchord

ENV TORCHORD_CHECKPOINT_DIR=/var/lib/torchord/checkpoints
VOLUME /var/lib/torchord/checkpoints /var/lib/torchord/tensorboard

# Celery finishes the task in hand on SIGTERM.
STOPSIGNAL SIGTERM
CMD ["celery", "-A", "torchord", "worker", "--loglevel", "INFO"]
