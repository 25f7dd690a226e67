# Sourced by the other scripts here: goes to the repository root and makes .venv with the given requirements.
# Usage: source setup.sh requirements.txt [more requirements files]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -e .venv/bin/python ] && [ ! -e .venv/Scripts/python.exe ]; then
    python=""
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "错误：需要 Python 3.10 或更新的版本。Debian/Ubuntu：sudo apt install python3 python3-venv" >&2
        exit 1
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "错误：$python 缺少 venv 模块。Debian/Ubuntu：sudo apt install python3-venv，然后重跑本命令。" >&2
        exit 1
    fi
    echo "创建虚拟环境 .venv（$("$python" --version)）…"
    "$python" -m venv .venv
fi
if [ -e .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; else PATH="$PWD/.venv/Scripts:$PATH"; fi

# What is installed is remembered, so that a second run starts at once, also offline.
stamp=.venv/installed-$(cat "$@" | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    echo "安装依赖（第一次需要几分钟）…"
    requirements=()
    for file in "$@"; do requirements+=(-r "$file"); done
    if ! python -m pip install --quiet --disable-pip-version-check "${requirements[@]}"; then
        echo "错误：依赖没有装好，请检查网络；国内可先 export PIP_INDEX_URL=镜像地址 再重跑本命令。" >&2
        exit 1
    fi
    touch "$stamp"
fi
export PYTHONUTF8=1
