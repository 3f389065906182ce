# mupscale on NVIDIA's CUDA runtime (cuBLASLt, NVRTC and NCCL are in it; the driver comes from the host).
#
#   docker build --tag mupscale .
#   docker run --gpus all --volume "$PWD:/data" mupscale doctor

# Debian 11: its glibc, 2.31, is older than that of the image below and of most machines.
FROM rust:1.89-bullseye AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bins

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
COPY --from=build /src/target/release/mupscale /src/target/release/mupscale-launch \
  /src/target/release/mupscale-convert /usr/local/bin/
COPY LICENSE-MIT LICENSE-APACHE /usr/share/doc/mupscale/
WORKDIR /data
ENTRYPOINT ["mupscale"]
CMD ["--help"]
