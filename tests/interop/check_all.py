#!/usr/bin/env python3
"""check_all.py < LINES: runs many `check_logits ...` and `check_ppl ...` lines in one process, since importing torch costs most of the time.

Prints one JSON line each; a check that raises is a check that failed. Exit 1 when any failed or when there was none.
"""
import json, shlex, sys
import check_logits, check_ppl

checks = [shlex.split(line) for line in sys.stdin if line.strip()]; results = []
for name, *argv in checks:
    try: results.append({"check_logits": check_logits, "check_ppl": check_ppl}[name].main(argv))
    except Exception as e:
        print(json.dumps(dict(check=name, arguments=argv, error=f"{type(e).__name__}: {e}"[:400], passed=False))); results.append(False)
    sys.stdout.flush()
print(f"{sum(map(bool, results))} of {len(results)} checks passed")
sys.exit(0 if results and all(results) else 1)
