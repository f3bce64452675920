"""``python -m robustbench_lite`` is ``robust-bench``."""

import sys

from robustbench_lite.cli import main

sys.exit(main())
