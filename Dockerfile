# postrider's image: docker build -t postrider:dev .

# --- build: Debian 12's own OpenSSL, so that what is linked is what the runtime stage has.
FROM rust:1.95-bookworm AS build
# librdkafka is compiled from source (gcc, make are in the base image) and links OpenSSL and zlib found by pkg-config.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libssl-dev pkg-config zlib1g-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# Dependencies first, against empty sources: this layer changes only with Cargo.toml, Cargo.lock or the toolchain.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src && touch src/lib.rs \
    && sed -n 's/^path = "\(.*\)"$/\1/p' Cargo.toml | while read -r file; do \
        mkdir -p "$(dirname "$file")" && echo 'fn main() {}' >"$file"; done \
    && cargo build --release --locked --bin postrider
# The product itself. New times on the files, because cargo compares them with those of the empty ones.
COPY migrations migrations
COPY src src
RUN find src migrations -type f -exec touch {} + \
    && cargo build --release --locked --bin postrider \
    && strip --strip-debug -o /postrider target/release/postrider

# --- runtime: the program and what it links at run time.
FROM debian:bookworm-slim
# libssl3 for Kafka, Redis and Postgres over TLS; ca-certificates to check public servers; zlib1g for librdkafka.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libssl3 zlib1g \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /postrider /usr/local/bin/postrider
COPY LICENSE /usr/share/doc/postrider/LICENSE
# Nobody in particular, by number, so that runAsNonRoot can be checked. Nothing is written to the file system.
USER 65532:65532
# API, and probes with metrics.
EXPOSE 8080 9090
STOPSIGNAL SIGTERM
# The program is process 1 and gets the signals itself; `docker run postrider migrate` replaces the command.
ENTRYPOINT ["postrider"]
CMD ["run"]
