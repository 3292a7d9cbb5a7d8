# One image for each kind of process: `docker build --target server|worker|migrate .`
# They share every layer and differ in what they run.

# A tag for those who build at home; scripts/images, which CI builds with, turns it into a digest.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# --- The locked dependencies: a layer of their own, which changes with the lock file alone.
FROM ${PYTHON_IMAGE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements.lock /build/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/jobsvc && \
    pip --python /opt/jobsvc/bin/python install --require-hashes -r /build/requirements.lock

# --- This project as a wheel, by a build tool that is locked too.
FROM ${PYTHON_IMAGE} AS wheel
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY requirements-build.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes -r requirements-build.lock
COPY pyproject.toml README.md ./
COPY generated generated
COPY jobsvc jobsvc
COPY worker worker
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

# --- What all three run in.
FROM ${PYTHON_IMAGE} AS runtime
# A fixed number, so that a host can give files to it; no home, no shell.
RUN groupadd --system --gid 10001 jobsvc && \
    useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin jobsvc
COPY --from=dependencies /opt/jobsvc /opt/jobsvc
# Copied, not mounted: not every builder notices that what it mounts has changed.
COPY --from=wheel /wheels /tmp/wheels
RUN pip --disable-pip-version-check --python /opt/jobsvc/bin/python \
        install --no-cache-dir --no-deps --no-index /tmp/wheels/*.whl && \
    rm -r /tmp/wheels
# The root file system may be read-only: the bytecode was compiled above, and /tmp is all it needs.
ENV PATH=/opt/jobsvc/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["jobsvc"]
ARG REVISION=unknown
ARG VERSION=unknown
ARG CREATED=1970-01-01T00:00:00Z
ARG SOURCE=unknown
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="jobsvc" \
    org.opencontainers.image.description="A durable job service over gRPC" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.created="${CREATED}" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.base.name="${PYTHON_IMAGE}"

FROM runtime AS migrate
CMD ["migrate"]
HEALTHCHECK NONE

FROM runtime AS worker
EXPOSE 9464
# Ready means that it consumes: a worker whose broker is away runs, but is not healthy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["jobsvc", "healthcheck", "--url", "http://127.0.0.1:9464/readyz"]
CMD ["worker"]

FROM runtime AS server
# The service itself refuses this address without TLS, unless told that the network is private.
ENV JOBSVC_LISTEN=0.0.0.0:50051
EXPOSE 50051 9464
# By its probes, which cost a tenth of a call by gRPC: a container whose JOBSVC_METRICS_LISTEN is
# elsewhere needs a check of its own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["jobsvc", "healthcheck", "--url", "http://127.0.0.1:9464/readyz"]
CMD ["server"]
