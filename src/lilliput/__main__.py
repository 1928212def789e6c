"""`python -m lilliput` is `lilliput`."""

import sys

from lilliput.cli import main

sys.exit(main())
