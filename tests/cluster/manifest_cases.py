"""What users ask for, by name: every command of the article, and every option once at least."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.cluster.manifests.objects import job_objects, server_objects, volume_objects
from hasten.cluster.spec import TrainingJob, TritonServer, Volume

HERE = Path(__file__).parent
PODMONITORS = "podmonitors.monitoring.coreos.com"
LWS = "leaderworkersets.leaderworkerset.x-k8s.io"
KEDA = "scaledobjects.keda.sh"
POOLS = "inferencepools.inference.networking.k8s.io"
ALL_CRDS = frozenset({PODMONITORS, LWS, KEDA, POOLS})


@dataclass(frozen=True)
class Case:
    """A specification, and how its objects are made."""

    spec: TrainingJob | TritonServer | Volume
    objects: Callable[[], list[dict[str, Any]]]


def job(command: str = "python train.py", **options: Any) -> Case:
    spec = TrainingJob(
        **{"name": "train", "namespace": "team", "image": "registry.example/hasten:1", "command": command, **options}
    )
    return Case(spec, lambda: job_objects(spec))


def server(crds: frozenset[str] = frozenset(), **options: Any) -> Case:
    spec = TritonServer(
        **{
            "name": "bloom",
            "version": "1",
            "namespace": "team",
            "image": "registry.example/hasten:1",
            "model_repository": "/mnt/repo",
            **options,
        }
    )
    return Case(spec, lambda: server_objects(spec, crds=crds))


def volume(secret: str | None = None, **options: Any) -> Case:
    spec = Volume(**{"name": "models", "namespace": "team", **options})
    return Case(spec, lambda: volume_objects(spec, secret))


_LAMBADA = "--tokenizer-path /mnt/model/bloom-7b1 --dataset-path /mnt/data/lambada/lambada_test.jsonl --batch-size 16"
_ARTICLE: dict[str, Any] = {"namespace": "default-group", "image": "registry.example/hasten:cuda"}
_JOB: dict[str, Any] = {**_ARTICLE, "data": ["bloom7b1-pvc:/mnt"]}
_SERVE: dict[str, Any] = {
    **_ARTICLE,
    "name": "ft-triton-bloom",
    "gpus": 2,
    "data": ["bloom7b1-pvc:/mnt"],
    "allow_metrics": True,
    "model_repository": "/mnt/triton_repo",
}

ARTICLE = {
    "article-volume": volume(
        "not-a-real-secret",
        name="bloom7b1-pvc",
        namespace="default-group",
        oss_bucket="bloom",
        oss_url="oss-cn-hangzhou-internal.aliyuncs.com",
        access_key_id="not-a-real-id",
    ),
    "article-convert": job(
        "hasten convert -i /mnt/model/bloom-7b1 -o /mnt/model/bloom-7b1-ft-fp16 -tp 2 -dt fp16 -p 64 -v",
        **{**_JOB, "name": "convert-bloom", "gpus": 1},
    ),
    "article-compare-hf": job(
        f"hasten bench lambada {_LAMBADA} --test-hf --show-progress", **{**_JOB, "name": "lambada-hf", "gpus": 2}
    ),
    "article-compare-hasten": job(
        f"mpirun -n 2 hasten bench lambada --checkpoint-path /mnt/model/bloom-7b1-ft-fp16/2-gpu {_LAMBADA} "
        "--show-progress",
        **{**_JOB, "name": "lambada-hasten", "gpus": 2},
    ),
    "article-serve": server(frozenset({PODMONITORS}), **_SERVE),
    "article-serve-without-operator": server(**_SERVE),
}

JOBS = {
    "job": job(),
    "job-quoting": job("""printf '%s\\n' "it's $HOME" $(date) $$ "$(( 1 + 1 ))"\n# é\n"""),
    "job-workers": job("torchrun --no-python hasten bench lambada", workers=3, gpus=2, nproc_per_node="2"),
    "job-resources": job(gpus=1, cpu="4", memory="16Gi", share_memory="8Gi"),
    "job-device": job(device=["amd.com/gpu=2"]),
    "job-env": job(env=["A=1", "TEXT=it's $(A) and $$", "HOME=/mnt/home"]),
    "job-data": job(data=["models:/mnt", "models:/models", "logs.of-all:/logs"]),
    "job-data-dir": job(data_dir=["/srv/data:/data", "/srv/logs"]),
    "job-config-file": job(
        config_file=[f"{HERE / 'golden' / 'config.ini'}:/etc/app/config.ini", f"{HERE / 'golden' / 'blob.bin'}:/b"]
    ),
    "job-annotation-and-label": job(annotation=["example.com/why=because"], label=["team=nlp"]),
    "job-placement": job(
        selector=["gpu=h100"],
        toleration=["gpu", "dedicated=nlp:NoSchedule,Equal"],
        priority="high",
        scheduler="volcano",
    ),
    "job-toleration-all": job(toleration=["all"]),
    "job-image-pull": job(image_pull_secret=["registry-key"], image_pull_policy="Never"),
    "job-working-dir": job(working_dir="/workspace", shell="bash"),
    "job-host-network-rdma": job(host_network=True, rdma=True, gpus=8),
    "job-gang-queue": job(workers=2, gang=True, queue="nlp", priority="high"),
    "job-retry": job(workers=2, retry=3),
    "job-limits": job(running_timeout="1h30m", ttl_after_finished="7d", clean_task_policy="All"),
    "job-sync-git": job(
        "python /root/code/app/train.py", sync_mode="git", sync_source="https://git.example/team/app.git"
    ),
    "job-sync-rsync": job(sync_mode="rsync", sync_source="rsync://files.example/code/app", working_dir="/workspace"),
    "job-tensorboard": job(tensorboard=True, logdir="/mnt/logs", data=["models:/mnt"], gpus=1),
    "indexed-job": job(
        "hasten batch /data/requests.jsonl /data/results --model /data/bloom --part $JOB_COMPLETION_INDEX/8",
        api="indexed",
        workers=8,
        parallelism=4,
        gpus=1,
        retry=3,
        data=["models:/data"],
        running_timeout="12h",
        queue="nlp",
        sync_mode="git",
        sync_source="https://git.example/team/app.git",
    ),
    "train-job": job(api="trainer"),
    "train-job-options": job(
        "torchrun --no-python hasten bench lambada",
        api="trainer",
        workers=2,
        gpus=2,
        nproc_per_node="2",
        cpu="8",
        memory="64Gi",
        env=["A=1"],
        data=["models:/mnt"],
        annotation=["example.com/why=because"],
        label=["team=nlp"],
        selector=["gpu=h100"],
        toleration=["gpu"],
        image_pull_secret=["registry-key"],
        queue="nlp",
        rdma=True,
        running_timeout="2h",
        tensorboard=True,
        logdir="/mnt/logs",
    ),
}

SERVERS = {
    "serve": server(),
    "serve-ports": server(http_port=9000, grpc_port=9001, metrics_port=9002, allow_metrics=True),
    "serve-resources": server(gpus=2, cpu="8", memory="64Gi", share_memory="16Gi", device=["rdma/hca=1"]),
    "serve-gpu-share": server(gpumemory=8, gpucore=50),
    "serve-replicas": server(replicas=3),
    "serve-load-model": server(load_model=["fastertransformer", "a model"]),
    "serve-extend-command": server(extend_command="--log-verbose 1 --id '$(hostname) $$'"),
    "serve-tritonserver": server(runtime="tritonserver", load_model=["fastertransformer"], allow_metrics=True),
    "serve-timeouts": server(exit_timeout=120, startup_timeout=3601),
    "serve-env-from-secret": server(env=["A=1"], env_from_secret=["HF_TOKEN=hub"]),
    "serve-storage": server(
        data=["models:/mnt"],
        data_subpath_expr=["models:runs/$(POD_NAME)"],
        data_dir=["/srv/cache:/cache"],
        temp_dir=["scratch:/scratch"],
        config_file=[f"{HERE / 'golden' / 'config.ini'}:/etc/app/config.ini"],
    ),
    "serve-placement": server(
        annotation=["example.com/why=because"],
        label=["team=nlp"],
        selector=["gpu=h100"],
        toleration=["gpu:NoSchedule"],
        image_pull_secret=["registry-key"],
        image_pull_policy="Always",
        working_dir="/workspace",
        priority="high",
        scheduler="volcano",
        host_network=True,
    ),
    "serve-expose": server(expose_service=True, allow_metrics=True),
    "serve-autoscale-cpu": server(autoscale="1:4", cpu="8"),
    "serve-autoscale-queue": server(
        ALL_CRDS,
        autoscale="2:8",
        autoscale_by="queue",
        prometheus="http://prometheus.monitoring:9090",
        allow_metrics=True,
    ),
    "serve-multinode": server(
        ALL_CRDS, runtime="tritonserver", multinode=2, gpus=8, replicas=2, allow_metrics=True, autoscale=None
    ),
    "serve-multinode-hasten": server(ALL_CRDS, multinode=2, gpus=8),
    "serve-multinode-autoscale": server(
        ALL_CRDS, runtime="tritonserver", multinode=4, gpus=8, cpu="32", autoscale="1:2", gateway="picker"
    ),
    "serve-gateway": server(ALL_CRDS, gateway="bloom-picker:9003", replicas=2),
}

VOLUMES = {
    "volume-oss-ossfs": volume(
        name="results",
        oss_bucket="bloom",
        oss_url="oss-cn-hangzhou.aliyuncs.com",
        oss_fuse="ossfs",
        path="/results",
        size="1Ti",
        mount_options="-o max_stat_cache_size=0",
        description="what jobs wrote",
    ),
    "volume-oss-read-only": volume(oss_bucket="bloom", oss_url="oss-cn-hangzhou.aliyuncs.com", read_only=True),
    "volume-s3": volume(s3_bucket="bloom", s3_region="eu-central-1", path="models"),
    "volume-s3-read-only": volume(s3_bucket="bloom", read_only=True, mount_options="metadata-ttl 60, max-threads 8"),
    "volume-nfs": volume(nfs_server="10.0.0.5", path="/export/models", mount_options="nfsvers=4.1,hard"),
    "volume-nfs-read-only": volume(nfs_server="10.0.0.5", path="/export/models", read_only=True),
}

CASES: dict[str, Case] = {**ARTICLE, **JOBS, **SERVERS, **VOLUMES}
