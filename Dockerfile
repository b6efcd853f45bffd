# syntax=docker/dockerfile:1
# One image for every torchord process: training server, Clients, Flower, TensorBoard, submitters.
#
#   docker build -t torchord .                                    torch for the CPU (small)
#   docker build -t torchord:cuda --build-arg TORCH_INDEX= .      torch with CUDA (PyPI's own Linux build)
#
# Any other index that carries the pinned torch version will do, for another CUDA version or ROCm.
# The image below it, by digest where one is given: deploy/images.sh asks for it.
ARG PYTHON_IMAGE=python:3.12-slim
FROM ${PYTHON_IMAGE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# SHA-256 of the wheel that TORCH_INDEX has; without one that wheel, and no other file, is taken unseen.
ARG TORCH_SHA256=
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# Only files whose hashes are in requirements/ (docs/dependencies.md). torch first: the largest layer changes least.
COPY requirements/torch.txt requirements/cuda.txt /src/requirements/
RUN set -eu; cd /src/requirements; \
    if [ -z "$TORCH_INDEX" ]; then \
        pip install --require-hashes --no-deps -r torch.txt -r cuda.txt; \
    elif [ -n "$TORCH_SHA256" ]; then \
        echo "$(grep -o '^torch==[^ ]*' torch.txt) --hash=sha256:$TORCH_SHA256" > chosen.txt; \
        pip install --require-hashes --no-deps --index-url "$TORCH_INDEX" -r chosen.txt; \
    else \
        pip install --no-deps --index-url "$TORCH_INDEX" "$(grep -o '^torch==[^ ]*' torch.txt)"; \
    fi
COPY requirements/run.txt /src/requirements/
RUN pip install --require-hashes --no-deps -r /src/requirements/run.txt

COPY pyproject.toml README.md LICENSE /src/
COPY torchord /src/torchord
COPY cache /src/cache
COPY coordinator /src/coordinator
COPY tasks /src/tasks
RUN pip install --no-deps --no-build-isolation /src && pip check && rm -rf /src

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
