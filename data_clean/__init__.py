"""Stage 0: raw corpora -> clean, deduplicated parquet."""

import os
from hashlib import sha256
from pathlib import Path

import numba

# numba compiles a function anew when its own file changes, but not when a function that it calls changes in another
# file (https://numba.readthedocs.io/en/stable/developer/caching.html#caching-limitations): machine code of an older
# version would go on running. So the folder of cached code is named after all the code in this one.
_HERE = Path(__file__).parent
_VERSION = sha256(b"".join(file.read_bytes() for file in sorted(_HERE.glob("*.py")))).hexdigest()[:16]
_CACHES = Path(os.environ.get("NUMBA_CACHE_DIR") or _HERE / "__pycache__")
numba.config.CACHE_DIR = str(_CACHES / f"data_clean-{_VERSION}")
