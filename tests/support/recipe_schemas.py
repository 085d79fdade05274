"""JSON schemas of the fields that the recipes use, as KubeRay (RayJob of ray.io/v1) and SkyPilot define them; what they
do not list is taken for a misspelling."""

from __future__ import annotations

from typing import Any

__all__ = ["RAY_JOB", "SKYPILOT"]

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string", "minLength": 1}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_POSITIVE: Schema = {"type": "integer", "minimum": 1}
_QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(Gi|Mi|m)?$"}


def _object(required: str = "", **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


_RESOURCES: Schema = {"type": "object", "additionalProperties": _QUANTITY}
_CONTAINER = _object(
    "name image resources volumeMounts",
    name=_TEXT,
    image=_TEXT,
    ports=_list(_object("containerPort name", containerPort=_POSITIVE, name=_TEXT)),
    resources=_object("requests limits", requests=_RESOURCES, limits=_RESOURCES),
    volumeMounts=_list(_object("name mountPath", name=_TEXT, mountPath={"type": "string", "pattern": "^/"})),
)
_VOLUME = _object(
    "name",
    name=_TEXT,
    persistentVolumeClaim=_object("claimName", claimName=_TEXT),
    emptyDir=_object("medium sizeLimit", medium={"const": "Memory"}, sizeLimit=_QUANTITY),
)
_POD = _object(
    "spec",
    spec=_object(
        "containers volumes terminationGracePeriodSeconds",
        restartPolicy={"enum": ["Never", "Always", "OnFailure"]},
        terminationGracePeriodSeconds=_POSITIVE,
        containers=_list(_CONTAINER),
        volumes=_list(_VOLUME),
    ),
)
_START: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
"""KubeRay takes texts only: a number unquoted is refused by the API server."""

RAY_JOB = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_object("name", name={"type": "string", "pattern": "^[a-z0-9-]{1,47}$"}),
    spec=_object(
        "entrypoint rayClusterSpec submissionMode backoffLimit shutdownAfterJobFinishes",
        entrypoint=_TEXT,
        runtimeEnvYAML=_TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        backoffLimit=_COUNT,
        submitterConfig=_object("backoffLimit", backoffLimit=_COUNT),
        activeDeadlineSeconds=_POSITIVE,
        preRunningDeadlineSeconds=_POSITIVE,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=_COUNT,
        suspend={"type": "boolean"},
        rayClusterSpec=_object(
            "headGroupSpec workerGroupSpecs",
            rayVersion={"type": "string"},
            authOptions=_object("mode", mode={"enum": ["disabled", "token"]}),
            headGroupSpec=_object("rayStartParams template", rayStartParams=_START, template=_POD),
            workerGroupSpecs=_list(
                _object(
                    "groupName replicas minReplicas maxReplicas template",
                    groupName=_TEXT,
                    replicas=_COUNT,
                    minReplicas=_COUNT,
                    maxReplicas=_COUNT,
                    rayStartParams=_START,
                    template=_POD,
                )
            ),
        ),
    ),
)

SKYPILOT = _object(
    "run",
    name=_TEXT,
    num_nodes=_POSITIVE,
    resources=_object(
        "job_recovery",
        accelerators=_TEXT,
        use_spot={"type": "boolean"},
        disk_size=_POSITIVE,
        job_recovery=_object(
            "strategy",
            strategy={"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
            max_restarts_on_errors=_COUNT,
            recover_on_exit_codes=_list({"type": "integer", "minimum": 0, "maximum": 255}),
        ),
    ),
    envs={"type": "object", "additionalProperties": {"type": "string"}},
    setup=_TEXT,
    run=_TEXT,
)
