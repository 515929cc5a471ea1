import sys

from nvae_fast.cli import main

sys.exit(main())
