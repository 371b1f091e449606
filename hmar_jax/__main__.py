"""`python -m hmar_jax` is `hmar-jax`."""

import sys

from hmar_jax.commands.main import main

sys.exit(main())
