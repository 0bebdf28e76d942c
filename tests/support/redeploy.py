"""Deploy a local cluster's application once more: Serve then replaces its replicas, one by one.

Run as `python -m tests.support.redeploy FOLDER GCS_ADDRESS` with the environment of that cluster's
processes. Returns when all replicas are new.
"""

import logging
import sys
from pathlib import Path

from cluster.launch_plan import read_plan


def main() -> None:
    folder, gcs_address = Path(sys.argv[1]), sys.argv[2]
    cluster = read_plan(folder)
    name = cluster.settings.app_name
    import ray
    from ray import serve

    from cluster.serve_app import application

    ray.init(address=gcs_address, namespace=name, log_to_driver=False, logging_level="ERROR")
    logging.getLogger("ray.serve").setLevel("ERROR")
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    target = serve.RunTarget(application(cluster), name, route_prefix="/", logging_config=quiet)
    serve.run_many([target], wait_for_applications_running=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
