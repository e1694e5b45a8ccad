"""A Ray cluster that changes under a job: a node that joins is used, one that dies is done without."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs Ray (pip install ray==2.60.0)")

SMALL = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture
def cluster():
    """A cluster of one node with a core, which the test may change."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=SMALL)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def tasks(cluster):
    from open_lm.preprocess import ray_workers

    ray = ray_workers.connect(cluster.address, n_cores=None, dashboard_host="127.0.0.1")
    yield ray_workers.RayTasks(ray, follow=True)
    ray.shutdown()


def _work(folder, number, seconds):
    """Note which node did it and how Ray calls it, when it is done."""
    import ray

    time.sleep(seconds)
    context = ray.get_runtime_context()
    Path(folder, f"{number}.{context.get_node_id()}").write_text(context.get_task_name())
    yield 1


@pytest.fixture
def running(tasks, tmp_path):
    """`running(n, seconds)` begins so many tasks beside the test; what it gives waits for their end."""

    def begin(n, seconds):
        calls = [partial(_work, str(tmp_path), number, seconds) for number in range(n)]
        pool = ThreadPoolExecutor(1)
        return pool.submit(tasks, calls, 1, label="tokenize", total_bytes=n)

    return begin


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_node_that_joins_is_used_and_one_that_dies_is_done_without(cluster, running, tmp_path):
    """Begun on one node: two join when a task is done, and one of these dies when it has done some itself."""

    def done_by(node):
        return [name for name in os.listdir(tmp_path) if name.endswith(node.node_id)]

    job = running(60, 0.4)
    wait_for(lambda: os.listdir(tmp_path))
    first, second = cluster.add_node(**SMALL), cluster.add_node(**SMALL)
    wait_for(lambda: done_by(first) or job.done())
    cluster.remove_node(first, allow_graceful=False)
    job.result(timeout=120)
    done = os.listdir(tmp_path)
    assert {int(name.partition(".")[0]) for name in done} == set(range(60))
    assert done_by(first) and done_by(second), "nodes that joined in the middle were not used"
    assert len(done) > len(done_by(first)) + len(done_by(second))
    assert {path.read_text() for path in tmp_path.iterdir()} == {"tokenize: _work"}, "as the dashboard shows it"


@pytest.mark.slow
def test_waiting_tasks_are_demand_that_an_autoscaler_sees(cluster, running, tmp_path):
    """All tasks wait in Ray's own queue, with the cores that they need."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    job, seen = running(16, 0.7), []

    def demand():
        found = get_cluster_status(cluster.address).resource_demands.ray_task_actor_demand
        seen[:] = [(bundle.bundle, bundle.count) for one in found for bundle in one.bundles_by_count]
        return sum(count for _, count in seen) >= 4 or job.done()

    wait_for(demand)
    assert not job.done(), "a queue of our own would hide them"
    assert all(bundle["CPU"] == 1 for bundle, _ in seen)
    job.result(timeout=120)
