"""DualViTok at full size, trained at 256 x 256: the sizes of the any-ratio model beside this file, other weights."""

import runpy
from pathlib import Path

vq_model = runpy.run_path(str(Path(__file__).with_name("dualvitok_anyres_max512.py")))["vq_model"]
