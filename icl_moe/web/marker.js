// A photograph and its mask on a canvas: boxes by two clicks or a drag, a brush and an eraser, by
// mouse, finger or keyboard. Gradio runs this once for each marker. The value is "" or JSON of
// {name, picture, mask, box}: pictures as data URLs, box as [x, y, width, height] in pixels of the
// picture, mask and box null while nothing is marked.
const SIDE = 1024; // Pixels along the longer side of the picture; models read fewer.
const MOST_BYTES = props.megabytes * 1e6;
const MOST_PIXELS = props.megapixels * 1e6;
const MOST_UNDO = 20;
const HINTS = {
  box: "Click two opposite corners, or drag. Keyboard: arrow keys, then Enter at each corner.",
  brush: "Paint over the object. Keyboard: Enter lowers and lifts the brush, arrow keys move it.",
  eraser: "Erase what does not belong. Keyboard: Enter lowers and lifts it, arrow keys move it.",
};

const find = (selector) => element.querySelector(selector);
const canvas = find("canvas"), context = canvas.getContext("2d");
const input = find("input[type=file]"), drop = find(".icl-drop"), work = find(".icl-work");
const size = find("input[type=range]"), status = find(".icl-status");
const picture = document.createElement("canvas"), mask = document.createElement("canvas");
const onlyBox = props.tools === "box";
let name = "", pictureUrl = "", written = "", tool = "box", box = null;
let corner = null, pointer = null, cursor = null, last = null, start = null, history = [];

input.setAttribute("aria-label", "Choose the photograph of an example");
canvas.setAttribute("aria-label", "The photograph, to be marked: " + HINTS.box);
if (onlyBox) {
  element.querySelectorAll("[data-tool], .icl-size").forEach((each) => (each.hidden = true));
}

const say = (text) => (status.textContent = text);

function reset() {
  name = pictureUrl = written = "";
  box = corner = pointer = cursor = last = null;
  history = [];
  input.value = "";
  work.hidden = true;
  drop.hidden = false;
  say("");
}

async function open(source, title) {
  const image = new Image();
  image.src = source;
  try {
    await image.decode();
  } catch {
    return say(title + " is not an image that this browser can read: use a JPEG or PNG file.");
  }
  const pixels = image.naturalWidth * image.naturalHeight;
  if (pixels > MOST_PIXELS) {
    return say(title + " has " + Math.round(pixels / 1e6) + " million pixels; at most " +
      props.megapixels + " million are allowed here: scale it down.");
  }
  const factor = Math.min(1, SIDE / Math.max(image.naturalWidth, image.naturalHeight));
  reset();
  for (const each of [canvas, picture, mask]) {
    each.width = Math.max(1, Math.round(image.naturalWidth * factor));
    each.height = Math.max(1, Math.round(image.naturalHeight * factor));
  }
  const paint = picture.getContext("2d");
  paint.fillStyle = "black"; // What is transparent is black for the model.
  paint.fillRect(0, 0, picture.width, picture.height);
  paint.imageSmoothingQuality = "high";
  paint.drawImage(image, 0, 0, picture.width, picture.height);
  pictureUrl = picture.toDataURL("image/png");
  name = title;
  drop.hidden = true;
  work.hidden = false;
  say(HINTS[tool]);
  draw();
  publish();
  return true;
}

async function openFile(file) {
  if (!file) return;
  if (file.size > MOST_BYTES) {
    return say(file.name + " is larger than " + props.megabytes + " megabytes.");
  }
  const url = URL.createObjectURL(file);
  if (await open(url, file.name)) canvas.focus();
  URL.revokeObjectURL(url);
}

function flattened() {
  // White on black, as mask files are.
  const flat = document.createElement("canvas");
  flat.width = mask.width;
  flat.height = mask.height;
  const paint = flat.getContext("2d");
  paint.fillStyle = "black";
  paint.fillRect(0, 0, flat.width, flat.height);
  paint.drawImage(mask, 0, 0);
  return flat.toDataURL("image/png");
}

function publish() {
  const marked = history.length > 0 && !onlyBox;
  written = JSON.stringify({name, picture: pictureUrl, mask: marked ? flattened() : null, box});
  props.value = written;
}

function remember() {
  const copy = mask.getContext("2d").getImageData(0, 0, mask.width, mask.height);
  history.push({pixels: copy, box});
  if (history.length > MOST_UNDO) history.splice(1, 1);
}

function draw() {
  context.drawImage(picture, 0, 0);
  if (!onlyBox) {
    const tint = document.createElement("canvas");
    tint.width = mask.width;
    tint.height = mask.height;
    const paint = tint.getContext("2d");
    paint.drawImage(mask, 0, 0);
    paint.globalCompositeOperation = "source-in";
    paint.fillStyle = "rgb(0, 196, 170)";
    paint.fillRect(0, 0, tint.width, tint.height);
    context.globalAlpha = 0.4;
    context.drawImage(tint, 0, 0);
    context.globalAlpha = 1;
  } else if (box) {
    outline(box);
  }
  const end = pointer || cursor;
  if (corner && end) outline(between(corner, end));
  if (corner) cross(corner);
  if (cursor) cross(cursor);
}

function line(width, colour, path) {
  context.lineWidth = width * Math.max(1, canvas.width / 500);
  context.strokeStyle = colour;
  context.beginPath();
  path();
  context.stroke();
}

function outline([x, y, w, h]) {
  line(4, "rgba(0, 0, 0, 0.6)", () => context.rect(x, y, w, h));
  line(2, "white", () => context.rect(x, y, w, h));
}

function cross([x, y]) {
  const arm = canvas.width / 40;
  const path = () => {
    context.moveTo(x - arm, y);
    context.lineTo(x + arm, y);
    context.moveTo(x, y - arm);
    context.lineTo(x, y + arm);
  };
  line(4, "rgba(0, 0, 0, 0.7)", path);
  line(2, "white", path);
}

const between = (a, b) =>
  [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.abs(a[0] - b[0]), Math.abs(a[1] - b[1])];

function addBox(a, b) {
  const drawn = between(a, b).map(Math.round);
  corner = null;
  if (drawn[2] < 2 || drawn[3] < 2) {
    say("That box is too small: its corners must lie apart.");
    return draw();
  }
  remember();
  box = drawn;
  if (!onlyBox) {
    const paint = mask.getContext("2d");
    paint.globalCompositeOperation = "source-over";
    paint.fillStyle = "white";
    paint.fillRect(...drawn);
  }
  say("The box is marked. " + (onlyBox ? "Another box replaces it." : HINTS.box));
  draw();
  publish();
}

function takeCorner(at) {
  if (corner) return addBox(corner, at);
  corner = at;
  say("One corner is set; now the opposite one.");
  draw();
}

function stroke(from, to) {
  const paint = mask.getContext("2d");
  paint.globalCompositeOperation = tool === "eraser" ? "destination-out" : "source-over";
  paint.strokeStyle = "white";
  paint.lineCap = paint.lineJoin = "round";
  paint.lineWidth = Math.max(1, (Number(size.value) / 100) * Math.max(mask.width, mask.height));
  paint.beginPath();
  paint.moveTo(...from);
  paint.lineTo(to[0] + 0.01, to[1]);
  paint.stroke();
  paint.globalCompositeOperation = "source-over";
}

function at(event) {
  const shown = canvas.getBoundingClientRect();
  const limit = (value, most) => Math.min(Math.max(value, 0), most);
  return [
    limit(((event.clientX - shown.left) / shown.width) * canvas.width, canvas.width),
    limit(((event.clientY - shown.top) / shown.height) * canvas.height, canvas.height),
  ];
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || !event.isPrimary) return;
  canvas.setPointerCapture(event.pointerId);
  cursor = null;
  pointer = start = last = at(event);
  if (tool === "box") {
    if (corner) {
      addBox(corner, pointer);
      start = null;
    } else {
      takeCorner(pointer);
    }
  } else {
    remember();
    stroke(last, pointer);
    draw();
  }
});

canvas.addEventListener("pointermove", (event) => {
  if (!event.isPrimary) return;
  pointer = at(event);
  if (tool !== "box" && last && event.buttons) {
    stroke(last, pointer);
    last = pointer;
    draw();
  } else if (corner) {
    draw();
  }
});

canvas.addEventListener("pointerup", (event) => {
  pointer = at(event);
  if (tool !== "box" && last) {
    publish();
  } else if (corner && start) {
    // A drag is a whole box; a click is only its first corner.
    const [, , w, h] = between(start, pointer);
    if (Math.max(w, h) > canvas.width / 50) addBox(start, pointer);
  }
  last = start = null;
});

canvas.addEventListener("keydown", (event) => {
  const step = ((event.shiftKey ? 5 : 1) / 100) * canvas.width;
  const moves = {
    ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step],
  };
  if (moves[event.key]) {
    const [x, y] = cursor || [canvas.width / 2, canvas.height / 2];
    const to = [
      Math.min(Math.max(x + moves[event.key][0], 0), canvas.width),
      Math.min(Math.max(y + moves[event.key][1], 0), canvas.height),
    ];
    if (last && tool !== "box") stroke(last, to);
    if (last) last = to;
    cursor = pointer = to;
    draw();
  } else if (event.key === "Enter" || event.key === " ") {
    cursor = cursor || [canvas.width / 2, canvas.height / 2];
    if (tool === "box") {
      takeCorner(cursor);
    } else if (last) {
      last = null;
      say("The " + tool + " is lifted.");
      publish();
    } else {
      remember();
      last = cursor;
      stroke(last, cursor);
      say("The " + tool + " is down: move it with the arrow keys.");
      draw();
    }
  } else if (event.key === "Escape") {
    corner = last = null;
    say(HINTS[tool]);
    draw();
  } else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) {
    undo();
  } else {
    return;
  }
  event.preventDefault();
});

function undo() {
  const before = history.pop();
  corner = last = null;
  if (before) {
    mask.getContext("2d").putImageData(before.pixels, 0, 0);
    box = before.box;
  }
  say(before ? "Undone." : "There is nothing to undo.");
  draw();
  publish();
}

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.tool) {
    tool = button.dataset.tool;
    corner = last = null;
    element.querySelectorAll("[data-tool]").forEach((each) =>
      each.setAttribute("aria-pressed", String(each === button)));
    canvas.setAttribute("aria-label", "The photograph, to be marked: " + HINTS[tool]);
    say(HINTS[tool]);
    draw();
  } else if (button.dataset.do === "undo") {
    undo();
  } else if (button.dataset.do === "clear") {
    mask.getContext("2d").clearRect(0, 0, mask.width, mask.height);
    history = [];
    box = corner = last = null;
    say(HINTS[tool]);
    draw();
    publish();
  } else if (button.dataset.do === "other") {
    reset();
    props.value = "";
    input.focus();
  }
});

input.addEventListener("change", () => openFile(input.files[0]));
for (const kind of ["dragenter", "dragover"]) {
  element.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("icl-over");
  });
}
element.addEventListener("dragleave", () => drop.classList.remove("icl-over"));
element.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("icl-over");
  openFile(event.dataTransfer.files[0]);
});

// The server empties the marker when it has taken the example.
watch("value", () => {
  if (props.value === written) return;
  if (!props.value) reset();
});
