# Build postrider's image:  docker build -t postrider:dev .
# With an SBOM, from the image's dpkg records and Cargo.lock:  docker buildx build --sbom=true -t postrider:dev .
# Without Docker:  dev/image

# The manifests with empty sources. This stage changes only with a Cargo.toml, with Cargo.lock or with the toolchain.
FROM rust:1.95-bookworm AS manifests
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY crates crates
RUN find crates -type f ! -name Cargo.toml -delete && find crates -mindepth 2 -type d -empty -delete \
    && for crate in . crates/*; do mkdir -p "$crate/src" && touch "$crate/src/lib.rs"; done \
    && sed -n 's/^path = "\(.*\)"$/\1/p' Cargo.toml | while read -r file; do \
        mkdir -p "$(dirname "$file")" && echo 'fn main() {}' >"$file"; done

# The build. It links Debian 12's OpenSSL, which the final image contains as well.
FROM rust:1.95-bookworm AS build
# librdkafka is compiled from source with the base image's gcc and make, and links the OpenSSL and zlib that pkg-config
# finds.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libssl-dev pkg-config zlib1g-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# Builds the dependencies first. This layer stays in the cache until the manifests change.
COPY --from=manifests /src /src
RUN cargo build --release --locked --bin postrider
# Builds postrider itself. The files get new modification times, because cargo compares them with those of the empty
# sources.
COPY migrations migrations
COPY crates crates
COPY src src
RUN find src crates migrations -type f -exec touch {} + \
    && cargo build --release --locked --bin postrider \
    && mkdir /out && strip --strip-debug -o /out/postrider target/release/postrider

# Only the program, so that an existing build can replace this stage
# (docker build --build-context binary=FOLDER, as dev/image --binary does).
FROM scratch AS binary
COPY --from=build /out/postrider /postrider

# The files that the program needs at run time. There is no shell and no package manager.
FROM debian:bookworm-slim AS rootfs
# libssl3: TLS to Kafka, Redis and Postgres. ca-certificates: to verify public servers. zlib1g: for librdkafka.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libssl3 zlib1g \
    && rm -rf /var/lib/apt/lists/*
COPY --from=binary /postrider /rootfs/usr/local/bin/postrider
COPY LICENSE Cargo.lock /rootfs/usr/share/doc/postrider/
# Copies the shared libraries of the program with Debian's folder links, the certificate authorities, the user, and
# dpkg's record of each package, which image scanners read.
RUN set -eu; cd /rootfs; mkdir -p etc/ssl/certs tmp usr/lib/ssl var/lib/dpkg/status.d; chmod 1777 tmp; \
    for folder in lib lib64; do if [ -L /$folder ]; then mkdir -p usr/$folder; ln -s usr/$folder $folder; fi; done; \
    ldd usr/local/bin/postrider | grep -o '/[^ ]*' | while read -r library; do \
        real=$(readlink -f "$library"); mkdir -p ".$(dirname "$real")"; cp -L "$real" ".$(dirname "$real")/$(basename "$library")"; \
        dpkg -S "$real" 2>/dev/null | cut -d: -f1 >>/tmp/packages; done; \
    test -e lib64/ld-linux-x86-64.so.2 || test -e lib/ld-linux-aarch64.so.1 || cp -L --parents "$(ls /lib*/ld-linux-* | head -n 1)" .; \
    cp -L /etc/ssl/certs/ca-certificates.crt etc/ssl/certs/; cp -L /etc/ssl/openssl.cnf usr/lib/ssl/; \
    ln -s /etc/ssl/certs/ca-certificates.crt usr/lib/ssl/cert.pem; \
    echo 'postrider:x:65532:65532::/:/nonexistent' >etc/passwd; echo 'postrider:x:65532:' >etc/group; \
    echo 'hosts: files dns' >etc/nsswitch.conf; \
    echo ca-certificates >>/tmp/packages; sort -u /tmp/packages | while read -r package; do \
        dpkg -s "$package" >"var/lib/dpkg/status.d/$package"; done; \
    chroot /rootfs /usr/local/bin/postrider --version

# The image itself: one layer, about 50 MB before compression.
FROM scratch
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="postrider" \
      org.opencontainers.image.description="Accepts events over HTTP, stores them in Kafka and delivers them" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=rootfs /rootfs /
ENV PATH=/usr/local/bin SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
# The user is a number, so that Kubernetes can check runAsNonRoot. The program writes nothing to the file system.
USER 65532:65532
# 8080: API. 9090: probes, metrics and /admin. By default postrider listens on 127.0.0.1 only, which nothing outside the
# container reaches: set POSTRIDER_HTTP__LISTEN=0.0.0.0:8080, POSTRIDER_MANAGEMENT__LISTEN=0.0.0.0:9090 and
# POSTRIDER_AUTH__MODE. They are not set here, because variables override a mounted postrider.yaml.
EXPOSE 8080 9090
STOPSIGNAL SIGTERM
# The program runs as process 1, so it receives signals directly. `docker run postrider migrate` replaces the command.
ENTRYPOINT ["/usr/local/bin/postrider"]
CMD ["run"]
