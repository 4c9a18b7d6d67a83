"""Which HTTP request reads a file of S3, Google Cloud Storage or the Hugging Face hub.

Credentials come from where each store's own tools take them: AWS_* variables, ~/.aws profiles,
AWS_ENDPOINT_URL for other servers than Amazon's; GOOGLE_APPLICATION_CREDENTIALS and gcloud's
login; HF_TOKEN and the hub's login. Without any, the request is made unsigned, for public files.
"""

import functools
import os
import re
from typing import Any
from urllib.parse import quote

from largebatch.errors import UserError

Headers = dict[str, str]


def address(url: str) -> tuple[str, Headers]:
    """Return the http(s) url, and the headers, that ask for the file at `url`.

    Raises UserError if the store's package is missing, or the url names no file of a store.
    """
    scheme, _, rest = url.partition("://")
    match scheme:
        case "s3":
            return _address_s3(url, *_bucket_and_key(url, rest))
        case "gs":
            return _address_gs(url, *_bucket_and_key(url, rest))
        case "hf":
            return _address_hf(url, rest)
    return url, {}


def learn_region(url: str, region: str) -> bool:
    """Take note that the bucket of the s3 `url` lies in `region`; whether that is news."""
    bucket = url.removeprefix("s3://").partition("/")[0]
    is_news = _regions.get(bucket) != region
    _regions[bucket] = region
    return is_news


GCS_URL = "https://storage.googleapis.com"

_regions: dict[str, str] = {}
_HUB_FILE = re.compile(
    r"(?:(datasets|spaces)/)?(?!datasets/|spaces/)([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)"
)
_GCS_READ_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"


def _bucket_and_key(url: str, rest: str) -> tuple[str, str]:
    bucket, _, key = rest.partition("/")
    if not bucket or not key:
        raise UserError(f"{url!r} names no file; it should be like s3://BUCKET/FOLDER/shard.tar")
    return bucket, key


def _address_s3(url: str, bucket: str, key: str) -> tuple[str, Headers]:
    # Imported here, as the others are: not every run needs them, and they are slow to import.
    try:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise _missing_package(url, "botocore") from None
    try:
        client, credentials = _s3_client(_regions.get(bucket))
        # Not signed yet: this finds the endpoint, and how the bucket's name goes into it.
        target: str = client.generate_presigned_url(
            "get_object", Params={"Bucket": bucket, "Key": key}
        )
        if credentials is None:
            return target, {}
        request = AWSRequest("GET", target)
        frozen = credentials.get_frozen_credentials()
        S3SigV4Auth(frozen, "s3", client.meta.region_name).add_auth(request)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"{url} cannot be asked for: {error}; check your AWS settings") from None
    return target, dict(request.headers.items())


@functools.cache
def _s3_client(region: str | None) -> tuple[Any, Any]:
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config

    session = botocore.session.Session()
    region = region or session.get_config_variable("region") or "us-east-1"
    client = session.create_client("s3", region, config=Config(signature_version=UNSIGNED))
    return client, session.get_credentials()


def _address_gs(url: str, bucket: str, key: str) -> tuple[str, Headers]:
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        base = emulator if "://" in emulator else f"http://{emulator}"
        return f"{base.rstrip('/')}/{bucket}/{quote(key)}", {}
    try:
        import google.auth.exceptions
    except ImportError:
        raise _missing_package(url, "google-auth") from None
    target = f"{GCS_URL}/{bucket}/{quote(key)}"
    headers: Headers = {}
    try:
        credentials, request = _gs_credentials()
        if credentials is not None:
            credentials.before_request(request, "GET", target, headers)
    except google.auth.exceptions.GoogleAuthError as error:
        raise UserError(
            f"{url} cannot be asked for: {error}; check GOOGLE_APPLICATION_CREDENTIALS, or log in "
            "with `gcloud auth application-default login`"
        ) from None
    return target, headers


@functools.cache
def _gs_credentials() -> tuple[Any, Any]:
    import google.auth
    import google.auth.exceptions
    import google.auth.transport.urllib3
    import urllib3

    transport: Any = google.auth.transport.urllib3  # It has no types.
    request = transport.Request(urllib3.PoolManager())
    try:
        credentials, _ = google.auth.default(scopes=[_GCS_READ_SCOPE], request=request)
    except google.auth.exceptions.DefaultCredentialsError:
        if "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:
            raise
        credentials = None
    return credentials, request


def _address_hf(url: str, rest: str) -> tuple[str, Headers]:
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        raise UserError(f"{url} is on the hub, and HF_HUB_OFFLINE is set; unset it")
    found = _HUB_FILE.fullmatch(rest)
    if not found:
        raise UserError(
            f"{url!r} names no file of the hub; it should be like "
            "hf://datasets/OWNER/NAME/FOLDER/shard.tar, or OWNER/NAME@REVISION"
        )
    kind, repository, revision, file = found.groups()
    target = huggingface_hub.hf_hub_url(
        repository,
        file,
        repo_type=kind and kind.removesuffix("s"),
        revision=revision,
        endpoint=os.environ.get("HF_ENDPOINT"),
    )
    token = huggingface_hub.get_token()
    return target, {"Authorization": f"Bearer {token}"} if token else {}


def _missing_package(url: str, package: str) -> UserError:
    return UserError(
        f"{url} needs the package {package}, which is not installed: pip install "
        "'largebatch[remote]'"
    )


# Their locks may be held by a thread of the parent, which a forked child doesn't have.
os.register_at_fork(after_in_child=_s3_client.cache_clear)
os.register_at_fork(after_in_child=_gs_credentials.cache_clear)
