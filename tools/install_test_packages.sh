#!/usr/bin/env bash
# Debian packages that some tests need: a browser for the reports, a SLURM of one machine, network namespaces, a linter
# of shell scripts, a C++ compiler. Without them those tests are skipped, and say so; with TAOPD_TESTS_MUST_RUN=1 they
# fail instead.
set -euo pipefail

packages=(chromium slurm-wlm munge shellcheck iproute2 g++)
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}" > /dev/null
