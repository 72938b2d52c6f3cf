"""Makes `import fastpeft` mean this checkout's, installed or not: a record names the commit that it measured."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(1, str(ROOT))
