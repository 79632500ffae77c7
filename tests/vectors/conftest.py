"""The outside vectors lie in no checkout: without AUTHSVC_VECTORS this folder is not collected."""

import os

collect_ignore_glob = [] if os.environ.get("AUTHSVC_VECTORS") else ["test_*.py"]
