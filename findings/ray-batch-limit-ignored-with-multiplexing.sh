#!/usr/bin/env bash
# serve.batch with max_concurrent_batches=1 runs a deployment's batches at the same time if requests were routed by model.
#
# Expected: max_concurrent_batches is "the maximum number of batches that can be executed concurrently", 1 by default. A
# batched method that does not await anything else in the meantime, such as one that hands the batch to a GPU, is then
# never entered twice.
#
# Happens: if the requests have a multiplexed model id, Ray divides every batch by it and starts all parts at once under
# one permit. Eight requests for four models are four calls of two requests each, all four of them running together.
# Without ids the same requests are one call of eight.
#
# Versions: ray[serve] 2.55.0, protobuf 6.33.6 (2.55.0 does not start with protobuf 7); Python 3.11.
#
# Seen on 2026-11-30:
#     ray 2.55.0
#     without model ids: batches of [8], at most 1 at a time
#     with 4 model ids: batches of [2, 2, 2, 2], at most 4 at a time
#     holds
#
# Why it matters: the method's model, buffers or adapters are changed by four threads of control while each believes to
# be alone. And requests for different LoRAs, which a model could run in one batch, never share one: the larger the
# number of adapters, the closer every batch is to one request. examples/serving enters the batch in an empty context.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check "ray[serve]==2.55.0" protobuf==6.33.6

cat > "$work/check.py" <<'PY'
import asyncio
import logging
import sys

import ray
from ray import serve


@serve.deployment(max_ongoing_requests=100)
class Deployment:
    def __init__(self):
        self.sizes, self.running, self.most = [], 0, 0

    @serve.multiplexed(max_num_models_per_replica=10)
    async def load(self, model_id):
        return model_id

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=2.0, max_concurrent_batches=1)
    async def batched(self, requests):
        self.sizes.append(len(requests))
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.5)
        self.running -= 1
        return requests

    async def __call__(self, request):
        return await self.batched(request)

    async def seen(self):
        found = sorted(self.sizes), self.most
        self.__init__()
        return found


ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         object_store_memory=100 * 2**20)
handle = serve.run(Deployment.bind())
print("ray", ray.__version__)


def ask(model_ids):
    answers = [handle.options(multiplexed_model_id=name).remote(number) for number, name in enumerate(model_ids)]
    assert [answer.result() for answer in answers] == list(range(8))
    return handle.seen.remote().result()


plain, routed = ask([""] * 8), ask("aabbccdd")
for label, (sizes, most) in (("without model ids", plain), ("with 4 model ids", routed)):
    print(f"{label}: batches of {sizes}, at most {most} at a time")
holds = plain == ([8], 1) and routed == ([2, 2, 2, 2], 4)
ray.shutdown()
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY

export RAY_USAGE_STATS_ENABLED=0 RAY_memory_monitor_refresh_ms=0
"$work/venv/bin/python" -W ignore "$work/check.py" 2> "$work/log" || { tail -20 "$work/log"; exit 1; }
