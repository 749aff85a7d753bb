// What packing.py packed, as typed arrays.

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** All float16 numbers by their bits: 10 of fraction, 5 of exponent, a sign. */
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
});

function arrayOf({ dtype, data }) {
  const bytes = bytesOf(data);
  if (dtype === "u1") return bytes;
  const words = new Uint16Array(bytes.buffer);
  return dtype === "u2" ? words : Float32Array.from(words, (bits) => HALVES[bits]);
}
