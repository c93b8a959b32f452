#!/usr/bin/python3
"""report.py OUT: count the last run in the stestr repository of this folder ("N passed, N failed, N skipped", on stdout)
and write each failure to OUT, one a line: the test's id, a tab, the error. A run of no test is a failure."""
import sys

import testtools
from stestr.repository import util


class Count(testtools.StreamToDict):
    def __init__(self):
        super().__init__(self.one)
        self.passed, self.failed, self.skipped = 0, [], 0

    def one(self, test):
        status = test['status']
        if status in ('success', 'xfail'):
            self.passed += 1
        elif status == 'skip':
            self.skipped += 1
        elif status in ('fail', 'uxsuccess', 'inprogress', 'unknown'):
            text = [d.as_text() for n, d in test['details'].items() if 'traceback' in n]
            last = [line for t in text for line in t.splitlines() if line.strip() and not line.startswith(' ')]
            self.failed.append((test['id'], (last or [status])[-1][:240]))


def main(out):
    count = Count()
    count.startTestRun()
    util.get_repo_open('file', '.').get_latest_run().get_test().run(count)
    count.stopTestRun()
    with open(out, 'w') as f:
        for test, why in count.failed:
            f.write(f'{test}\t{why}\n')
    print(f'   {count.passed} passed, {len(count.failed)} failed, {count.skipped} skipped')
    for test, why in count.failed:
        print(f'   {test}: {why}')
    return 0 if count.passed or count.failed else 1


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
