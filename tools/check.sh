#!/usr/bin/env bash
# Are the generated files what the pages say, is everything formatted, do packages, pages, lines and docstrings keep
# their rules? All checks run, the exit code says whether one failed. Changes nothing that is in order; works in a
# dirty checkout too, where it says what the generators would change.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

made=(udanb README.md CONTRIBUTING.md nbs)
state() {
    git diff -- "${made[@]}"
    git ls-files -o --exclude-standard -- "${made[@]}" | sort | xargs -r -d '\n' sha1sum
}
before=$(mktemp) && after=$(mktemp) && trap 'rm -f "$before" "$after"' EXIT
state >"$before"
nbdev_export
nbdev_clean
python tools/quarto render nbs/index.ipynb -o README.md -t gfm
python tools/modules.py
state >"$after"
if ! diff "$before" "$after"; then
    echo "Generated files were not what the pages say (above: what 'make export' changed)." \
        "Edit pages, not modules; then commit the result." >&2
    exit 1
fi

failed=0
check() { "$@" || failed=1; }
check ruff check --output-format concise .
check ruff format --check --output-format concise .
check python tools/packages.py udanb nbs
check python tools/nblint.py nbs
check python tools/density.py --brief
check python tools/docstrings.py
check python tools/api.py --check
exit $failed
