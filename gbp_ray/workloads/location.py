"""Access to a workload's files: a folder or file of this machine, or `s3://bucket/prefix`.

Reading is pyarrow's: S3 credentials, region and endpoint come from the environment (AWS_PROFILE,
AWS_ACCESS_KEY_ID, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL) or from the address itself
(`s3://bucket/prefix?endpoint_override=host:port&scheme=http`).
"""

from __future__ import annotations

from pathlib import Path

from pyarrow import ArrowException
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from gbp_ray.config.address import names_user
from gbp_ray.errors import WorkloadError

__all__ = [
    "describe_fault",
    "list_files",
    "open_location",
    "read_bytes",
]


def open_location(address: str, key: str) -> tuple[FileSystem, str]:
    """Turns an address into a file system and a path on it.

    Args:
        address: A path, or `scheme://...`.
        key: Dotted name of the option that holds the address, for messages.

    Raises:
        WorkloadError: The address is not text, holds credentials, or names an unknown kind of
            storage.
    """
    if not isinstance(address, str) or not address:
        raise WorkloadError(
            f"{key} = {address!r}: must be the path of a file or folder, or s3://bucket/prefix"
        )
    if "://" not in address:
        return LocalFileSystem(), str(Path(address).expanduser().absolute())
    if names_user(address):
        # Not echoed: options are kept in records and logs.
        raise WorkloadError(
            f"{key}: the address holds credentials; give them in the environment "
            "(AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    try:
        return FileSystem.from_uri(address)
    except (ArrowException, OSError) as error:
        raise WorkloadError(
            f"{key} = '{address}': {describe_fault(error)}; give a folder or s3://bucket/prefix"
        ) from error


def list_files(address: str, key: str) -> tuple[FileSystem, list[FileInfo]]:
    """Lists the files and folders directly inside a folder, by name.

    Raises:
        WorkloadError: The folder does not exist or cannot be listed.
    """
    filesystem, path = open_location(address, key)
    try:
        entries = filesystem.get_file_info(FileSelector(path))
    except FileNotFoundError:
        raise WorkloadError(
            f"{key} = '{address}': no such folder; set {key} to the folder that holds the data"
        ) from None
    except (ArrowException, OSError) as error:
        raise WorkloadError(
            f"{key} = '{address}': cannot be listed: {describe_fault(error)}; set {key} to a "
            "folder that can be read"
        ) from error
    return filesystem, sorted(entries, key=lambda entry: entry.base_name)


def read_bytes(address: str, key: str) -> bytes:
    """Reads one file whole.

    Raises:
        WorkloadError: It does not exist or cannot be read.
    """
    filesystem, path = open_location(address, key)
    try:
        if filesystem.get_file_info(path).type is not FileType.File:
            raise WorkloadError(
                f"{key} = '{address}': no such file; set {key} to an existing file or leave it out"
            )
        with filesystem.open_input_stream(path) as stream:
            return stream.read()
    except (ArrowException, OSError) as error:
        raise WorkloadError(
            f"{key} = '{address}': cannot be read: {describe_fault(error)}; check the address and "
            "the rights"
        ) from error


def describe_fault(error: BaseException) -> str:
    """Cuts another library's message to its first line, and names its type where it is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
