# Foldwise in a container: `train` runs commands, `serve` answers over HTTP. docs/SERVING.md says how to use both.
#
#   docker build --target serve -t foldwise:0.1.0-serve .                       # any CPU
#   docker build --target serve -t foldwise:0.1.0-serve-gpu --build-arg TORCH_INDEX= .   # NVIDIA: torch of PyPI, with CUDA
#
# BASE may name the same image by digest: --build-arg BASE=python:3.11.14-slim-trixie@sha256:...
ARG BASE=python:3.11.14-slim-trixie

# ---- packages: what requirements.lock pins, and of that only what the image needs --------------------------------
FROM ${BASE} AS packages
# torch and torchvision come from this index, in one pair of versions, or with all else from PyPI where it is empty.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve,export,explain,tensorboard
WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=/var/cache/pip
COPY pyproject.toml requirements.lock ./

# The lock holds the tools of development too. pip says what the image needs of it, and only that is installed.
COPY <<'PY' image_lock.py
"""Write image.lock: the part of requirements.lock that the project with $EXTRAS asks for, versions and hashes unchanged."""
import json, os, re, subprocess, sys, tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = [extra for extra in os.environ["EXTRAS"].split(",") if extra]
wanted = [*project["dependencies"], *(want for extra in extras for want in project["optional-dependencies"][extra])]
Path("wanted.txt").write_text("\n".join([*wanted, "setuptools"]) + "\n")
blocks = re.split(r"\n(?=[A-Za-z0-9])", Path("requirements.lock").read_text().strip())
Path("pins.txt").write_text("\n".join(block.splitlines()[0].rstrip("\\ ") for block in blocks) + "\n")
pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "plan.json"]
subprocess.run([*pip, "--constraint", "pins.txt", "--requirement", "wanted.txt"], check=True)
plan = json.loads(Path("plan.json").read_text())["install"]
needed = {re.sub(r"[-_.]+", "-", one["metadata"]["name"]).lower() for one in plan}
kept = [block for block in blocks if block.split("==")[0] in needed]
if unpinned := sorted(needed - {block.split("==")[0] for block in kept}):
    raise SystemExit(f"requirements.lock does not pin {', '.join(unpinned)}: make it anew, as CONTRIBUTING.md says")
Path("image.lock").write_text("\n".join(kept) + "\n")
PY

# The lock has no hashes of the CPU index's wheels, so that these two alone are held to their versions only.
RUN --mount=type=cache,target=/var/cache/pip \
    if [ -n "$TORCH_INDEX" ]; then \
      grep -oE '^(torch|torchvision)==[^ ]+' requirements.lock > torch.txt \
      && PIP_INDEX_URL="$TORCH_INDEX" pip install --no-deps --requirement torch.txt; \
    fi \
    && python image_lock.py \
    && pip install --require-hashes --no-deps --requirement image.lock \
    && pip check

# ---- wheel: the project itself ---------------------------------------------------------------------------------
FROM packages AS wheel
COPY README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel .

# ---- base: no compiler, no pip cache, no root --------------------------------------------------------------------
FROM ${BASE} AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    WANDB_CONFIG_DIR=/tmp/wandb \
    WANDB_CACHE_DIR=/tmp/wandb \
    HF_HOME=/cache/huggingface \
    NO_ALBUMENTATIONS_UPDATE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages /opt/venv /opt/venv
# /cache is everybody's, since compose runs as whoever owns the project's folders on the host.
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --no-deps --no-index /wheel/*.whl \
    && groupadd --gid 10001 foldwise \
    && useradd --uid 10001 --gid foldwise --no-create-home --home-dir /tmp --shell /usr/sbin/nologin foldwise \
    && install -d -m 1777 /cache \
    && install -d -o foldwise -g foldwise /app /app/inputs /app/oof /app/submissions
WORKDIR /app
COPY run.py requirements.lock ./
COPY experiments experiments
# What the server's page says of the models.
COPY docs/MODEL_CARD.md docs/
USER 10001:10001
# As Ctrl-C: a training keeps its last whole epoch, the server answers what it has begun.
STOPSIGNAL SIGINT
ENTRYPOINT ["python", "run.py"]

FROM base AS train
CMD ["--help"]

FROM base AS serve
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# All addresses of the container; compose.yaml publishes the port on the host's loopback alone.
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
