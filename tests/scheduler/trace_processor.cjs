// Runs Perfetto's trace processor as its web page does, in a worker: requests on stdin, replies on
// stdout. The argument is the page's folder, with engine_bundle.js and the WebAssembly files.
const fs = require("fs");
const path = require("path");

const read = (name) => fs.readFileSync(path.join(process.argv[2], path.basename(name)));
globalThis.self = globalThis;
globalThis.WorkerGlobalScope = Object;
globalThis.location = { href: "" };
globalThis.XMLHttpRequest = class {
  open(method, name) {
    this.name = name;
  }
  send() {
    this.response = new Uint8Array(read(this.name)).buffer;
  }
};
console.log = console.warn;
new Function("process", read("engine_bundle.js").toString())(); // it must not see that this is Node
const port = { postMessage: (reply) => fs.writeSync(1, reply) };
globalThis.onmessage({ data: port });
setImmediate(() => port.onmessage({ data: new Uint8Array(fs.readFileSync(0)) }));
