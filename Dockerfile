# One image for the coordinator and every site: which of the two it is, its command says. It holds
# code alone; keys, configuration, images and state are mounted (docker-compose.yml).
FROM python:3.11-slim

# The CPU build of torch; for a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    HOME=/tmp

WORKDIR /opt/consilium

# torch comes first and by itself: left to the resolver, an open range would choose another build.
COPY constraints.txt ./
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"

COPY pyproject.toml README.md LICENSE ./
COPY common common
COPY client client
COPY server server
RUN pip install -c constraints.txt .

RUN useradd --system --uid 10001 --no-create-home consilium \
    && install -d -o consilium -g consilium -m 0700 /var/lib/consilium
USER consilium

# fl-client, fl-server, fl-certs and fl-report are on the path.
CMD ["fl-client", "--help"]
