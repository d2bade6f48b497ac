// Creates a zip without holding the files in memory: the browser streams the parts of the Blob from disk.

const TABLE = new Uint32Array(256).map((_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

async function crc32(file, onBytes) {
  let value = 0xffffffff;
  const reader = file.stream().getReader();
  for (;;) {
    const { done, value: chunk } = await reader.read();
    if (done) return (value ^ 0xffffffff) >>> 0;
    for (const byte of chunk) value = TABLE[(value ^ byte) & 0xff] ^ (value >>> 8);
    onBytes(chunk.length);
  }
}

function record(signature, fields) {
  const view = new DataView(new ArrayBuffer(4 + fields.reduce((sum, [size]) => sum + size, 0)));
  view.setUint32(0, signature, true);
  let at = 4;
  for (const [size, value] of fields) {
    size === 2 ? view.setUint16(at, value, true) : view.setUint32(at, value, true);
    at += size;
  }
  return view.buffer;
}

export const MOST_BYTES = 0xfffffff0; // a zip without its 64-bit extension

// files: [{ name, file }]. Stored uncompressed, as weights hardly compress. `onBytes` is called with bytes read.
export async function zip(files, onBytes = () => {}) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, file } of files) {
    const title = new TextEncoder().encode(name);
    const crc = await crc32(file, onBytes);
    const common = [[2, 20], [2, 0x0800], [2, 0], [2, 0], [2, 0x21], [4, crc], [4, file.size], [4, file.size], [2, title.length], [2, 0]];
    const head = record(0x04034b50, common);
    parts.push(head, title, file);
    directory.push(record(0x02014b50, [[2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]]), title);
    offset += head.byteLength + title.length + file.size;
  }
  const size = directory.reduce((sum, piece) => sum + piece.byteLength, 0);
  const end = record(0x06054b50, [[2, 0], [2, 0], [2, files.length], [2, files.length], [4, size], [4, offset], [2, 0]]);
  return new Blob([...parts, ...directory, end]);
}
