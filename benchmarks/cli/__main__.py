"""The ``adfq`` command as ``python -m benchmarks.cli``."""

import sys

from benchmarks.cli.main import main

sys.exit(main())
