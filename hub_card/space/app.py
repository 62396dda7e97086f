"""The Space: the page of `groupformer app`, for the checkpoint that MODEL names."""

import os

from groupformer.app import launch


launch(os.environ.get("MODEL", "groupformer/groupformer-reference"), host="0.0.0.0", port=7860)
