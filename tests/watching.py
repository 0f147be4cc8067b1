"""What tests of whole runs share: calls recorded or interrupted, results without timings, files that are damaged."""

import zipfile


def without_timings(value):
    """results.json without what may differ between two equal runs."""
    if isinstance(value, dict):
        varying = ("seconds", "latency_ms", "images_per_second", "file_bytes", "command", "output_dir", "resume", "quiet",
                   "git_commit")  # fmt: skip
        return {k: without_timings(v) for k, v in value.items() if k not in varying}
    return [without_timings(v) for v in value] if isinstance(value, list) else value


def interrupted_at(patch, owner, name, number):
    """Ctrl-C in the call of that number; returns the list of the calls' arguments."""
    function, calls = getattr(owner, name), []

    def call(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == number:
            raise KeyboardInterrupt
        return function(*arguments, **keywords)

    patch.setattr(owner, name, call)
    return calls


def with_flipped_bit(path):
    """The content of a file that torch.save wrote, with one bit of its largest member flipped."""
    with zipfile.ZipFile(path) as archive:
        member = archive.read(max(archive.infolist(), key=lambda member: member.file_size))
    content = bytearray(path.read_bytes())
    content[content.index(member) + len(member) // 2] ^= 1
    return bytes(content)
