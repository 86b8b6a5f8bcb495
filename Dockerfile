# One image for service, relay, worker and `outbox migrate`; the command selects one. The base may be any CPython from
# 3.11 on Debian or a derivative.
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build

# --build-arg PIP_INDEX_URL=… uses another package index. The final image does not contain the URL.
ARG PIP_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

WORKDIR /build
COPY requirements.lock requirements-runtime.lock ./
RUN python -m venv --without-pip /opt/outbox \
 && python -m pip --python /opt/outbox/bin/python install --require-hashes --no-deps -r requirements-runtime.lock

# The wheel's build backend, with the versions and hashes of the development lock. If pip misses one of its
# dependencies, add that to the list.
RUN python -m venv tools \
 && awk '/^[a-z]/ { wanted = /^(hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)==/ } wanted' \
      requirements.lock >tools.lock \
 && tools/bin/python -m pip install --require-hashes -r tools.lock

COPY pyproject.toml README.md ./
COPY sql sql
COPY outbox outbox
COPY service service
COPY relay relay
COPY worker worker
RUN tools/bin/python -m hatchling build -t wheel -d dist \
 && python -m pip --python /opt/outbox/bin/python install --no-deps --no-index dist/*.whl

FROM ${PYTHON_IMAGE}

RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin outbox
COPY --from=build /opt/outbox /opt/outbox

# The default of HTTP_SERVER_ADDRESS, 127.0.0.1, is not reachable from outside the container.
ENV PATH=/opt/outbox/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HTTP_SERVER_ADDRESS=0.0.0.0:8080

WORKDIR /opt/outbox
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
CMD ["outbox", "--help"]
