#!/usr/bin/env bash
# Installs a wheel into an empty environment and uses it from outside the checkout:
#
#     bash benchmarks/wheel.sh dist/jdm-0.2.0-py3-none-any.whl
#
# Prints the size of the environment and the number of its packages. Ends with status 0 where all of it works.
set -euo pipefail
wheel=$(realpath "$1")
where=$(mktemp -d)
trap 'rm -rf "$where"' EXIT
cd "$where"
python3 -m venv env
env/bin/pip install --quiet --no-compile "$wheel"
echo "environment: $(du -sm env | cut -f1) MB, $(env/bin/pip list 2>/dev/null | tail -n +3 | wc -l) packages"
export TFDS_DATA_DIR=$where/data
env/bin/jdm doctor
env/bin/jdm sample --checkpoint=digits --seeds=0-3 --labels=0,1 --out=samples.png
test -s samples.png
env/bin/python - <<'PYTHON'
from pathlib import Path

import jdm
from jdm.config import config_names, load_config

home = Path(jdm.__file__).parent
assert "site-packages" in str(home), home
assert (home / "py.typed").exists()
assert not [path for path in home.rglob("test*.py")]
for name in config_names():
    load_config(name, [])
print(f"{len(config_names())} configs")
PYTHON
env/bin/jdm train --config=digits --workdir=run --config.train.steps=2 --config.eval.every=0 --dry-run
