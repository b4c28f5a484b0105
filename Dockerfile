# postrider's image:  docker build -t postrider:dev .
# With a list of what is in it:  docker buildx build --sbom=true -t postrider:dev .   (dpkg's records and Cargo.lock are in it)
# Without Docker:  dev/image

# --- manifests: what names the dependencies, with empty sources: it changes only with a Cargo.toml, Cargo.lock or the
# toolchain.
FROM rust:1.95-bookworm AS manifests
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY crates crates
RUN find crates -type f ! -name Cargo.toml -delete \
    && for crate in . crates/*; do mkdir -p "$crate/src" && touch "$crate/src/lib.rs"; done \
    && sed -n 's/^path = "\(.*\)"$/\1/p' Cargo.toml | while read -r file; do \
        mkdir -p "$(dirname "$file")" && echo 'fn main() {}' >"$file"; done

# --- build: Debian 12's own OpenSSL, so that what is linked is what the runtime stage has.
FROM rust:1.95-bookworm AS build
# librdkafka is compiled from source (gcc, make are in the base image) and links OpenSSL and zlib found by pkg-config.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libssl-dev pkg-config zlib1g-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# Dependencies first: this layer stays as long as the manifests do.
COPY --from=manifests /src /src
RUN cargo build --release --locked --bin postrider
# The product itself. New times on the files, because cargo compares them with those of the empty ones.
COPY migrations migrations
COPY crates crates
COPY src src
RUN find src crates migrations -type f -exec touch {} + \
    && cargo build --release --locked --bin postrider \
    && mkdir /out && strip --strip-debug -o /out/postrider target/release/postrider

# --- binary: a name for the program alone, so that one that is built already can take its place
# (docker build --build-context binary=FOLDER, which is what dev/image --binary does).
FROM scratch AS binary
COPY --from=build /out/postrider /postrider

# --- rootfs: what the program needs at run time, and nothing else: no shell, no package manager.
FROM debian:bookworm-slim AS rootfs
# libssl3 for Kafka, Redis and Postgres over TLS; ca-certificates to check public servers; zlib1g for librdkafka.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libssl3 zlib1g \
    && rm -rf /var/lib/apt/lists/*
COPY --from=binary /postrider /rootfs/usr/local/bin/postrider
COPY LICENSE Cargo.lock /rootfs/usr/share/doc/postrider/
# The libraries that it names, with the links to their folders as Debian has them; authorities; who it runs as; and dpkg's
# record of each package, for whoever scans the image.
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

# --- runtime: one layer of that, some 50 MB before compression.
FROM scratch
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="postrider" \
      org.opencontainers.image.description="Events in over HTTP, kept in Kafka, carried to where they are wanted" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=rootfs /rootfs /
ENV PATH=/usr/local/bin SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
# Nobody in particular, by number, so that runAsNonRoot can be checked. Nothing is written to the file system.
USER 65532:65532
# API, and probes with metrics.
EXPOSE 8080 9090
STOPSIGNAL SIGTERM
# The program is process 1 and gets the signals itself; `docker run postrider migrate` replaces the command.
ENTRYPOINT ["/usr/local/bin/postrider"]
CMD ["run"]
