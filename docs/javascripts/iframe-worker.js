// Search in a site that is opened from files. Browsers start no Worker from file:// addresses, so the search's worker
// runs in a hidden frame instead, under the name that the theme looks for. On a server this file does nothing.
class IFrameWorker extends EventTarget {
  constructor(address) {
    super()
    const frame = document.createElement("iframe")
    frame.hidden = true
    document.body.appendChild(frame)
    this.scope = frame.contentWindow
    this.scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
    this.scope.importScripts = (...addresses) =>
      addresses.reduce((loaded, next) => loaded.then(() => this.load(next)), Promise.resolve())
    this.ready = this.load(address)
  }

  load(address) {
    return new Promise((resolve, reject) => {
      const script = this.scope.document.createElement("script")
      script.src = String(address)
      script.onload = resolve
      script.onerror = reject
      this.scope.document.body.appendChild(script)
    })
  }

  postMessage(data) {
    this.ready.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })))
  }

  terminate() {
    this.scope.frameElement.remove()
  }
}

if (location.protocol === "file:") {
  window.IFrameWorker = IFrameWorker
  window.Worker = IFrameWorker
}
