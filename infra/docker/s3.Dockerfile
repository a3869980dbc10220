# An S3 server for one machine: Ceph's gateway on one store. What the tests run is what is in it.
#   docker build -f infra/docker/s3.Dockerfile -t adaconv-s3:0.1.0 .
ARG BASE=debian:12.12-slim
FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ceph-base ceph-common ceph-mon ceph-osd python3 python3-boto3 python3-psutil radosgw tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --home-dir /data s3
COPY infra/local/ceph.py infra/local/processes.py /opt/adaconv/infra/local/
WORKDIR /opt/adaconv
USER 1000
VOLUME /data
EXPOSE 9000
ENTRYPOINT ["/usr/bin/tini", "--", "python3", "-m", "infra.local.ceph", "--folder", "/data"]
CMD ["--address", "0.0.0.0", "--port", "9000", "--bucket", "adaconv", "--bucket", "mlflow"]
