"""Opens a page in Chromium, as Qt brings it, runs a script there, and prints what it gave and what the page logged.

python chromium.py PAGE WIDTH SCRIPT [PICTURE]
"""

from __future__ import annotations

import json
import sys

from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEnginePage
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

PATIENCE = 60_000  # milliseconds


class Page(QWebEnginePage):
    """A page that keeps what it logs."""

    logged: list[str] = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.logged.append(message)


def main() -> None:
    path, width, script, *picture = sys.argv[1:]
    app = QApplication([sys.argv[0], "--no-sandbox"])
    view, page = QWebEngineView(), Page()
    view.setPage(page)
    view.resize(int(width), 1000)

    def show(result):
        print(json.dumps({"result": result, "logged": page.logged}), flush=True)
        if picture:
            view.grab().save(picture[0])
        app.quit()

    view.loadFinished.connect(
        lambda _: page.runJavaScript(script, lambda found: QTimer.singleShot(500, lambda: show(found)))
    )
    view.load(QUrl.fromLocalFile(path))
    view.show()
    QTimer.singleShot(PATIENCE, app.quit)
    app.exec()


if __name__ == "__main__":
    main()
