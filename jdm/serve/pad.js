// A square picture: chosen from a file, photographed, pasted, dropped, taken from the examples, or
// drawn. The value is JSON: {picture, region, sent}. "picture" and "region" are data URLs, or "".
// A file is not decoded here: it is sent with the event "send", and the server answers with what
// the model sees of it, or with the reason why not.
const SIDE = 320;
const find = (name) => element.querySelector(name);
const picture = find(".pad-picture"), marks = find(".pad-marks"), video = find("video");
const file = find("input[type=file]"), note = find(".pad-note"), view = find(".pad-view");
const size = find(".pad-size"), colour = find(".pad-colour"), snap = find("[data-do=snap]");
const paper = picture.getContext("2d"), film = marks.getContext("2d");
let last = null, stream = null, cursor = { x: SIDE / 2, y: SIDE / 2 };
let state = { picture: "", region: "" };

const say = (text) => { note.textContent = text; };
const marking = () => props.region && find("input[value=region]").checked;
const tell = (event) => { props.value = JSON.stringify(state); trigger(event); };

function blank() {
  paper.fillStyle = props.background;
  paper.fillRect(0, 0, SIDE, SIDE);
  unmark();
}
function unmark() {
  film.clearRect(0, 0, SIDE, SIDE);
  state.region = "";
}
function show(url, then) {
  const image = new Image();
  image.onload = () => {
    paper.imageSmoothingEnabled = false;
    paper.drawImage(image, 0, 0, SIDE, SIDE);
    if (then) then();
  };
  image.src = url;
}
function send(blob) {
  const most = props.megabytes * 1024 * 1024;
  if (blob.size > most) {
    say(`The picture has ${(blob.size / 1048576).toFixed(1)} MB; at most ${props.megabytes} MB are taken.`);
    return;
  }
  say("Reading the picture …");
  const reader = new FileReader();
  reader.onload = () => {
    unmark();
    props.value = JSON.stringify({ picture: "", region: "", sent: reader.result.replace(/^data:[^,]*,/, "data:;base64,") });
    trigger("send");
  };
  reader.readAsDataURL(blob);
}
watch("value", () => {  // the server's answer
  const found = JSON.parse(props.value || "{}");
  if (found.note !== undefined) say(found.note);
  if (!found.picture) {
    props.value = JSON.stringify(state);  // as it was before
  } else {
    state = { picture: found.picture, region: "" };
    unmark();
    show(found.picture, () => tell("picked"));
  }
});

// Drawing ---------------------------------------------------------------------------------------
function dot(from, to) {
  const context = marking() ? film : paper;
  context.strokeStyle = marking() ? "#ff9a00" : colour.value;
  context.lineWidth = (size.value * SIDE) / 100;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(from.x, from.y);
  context.lineTo(to.x + 0.01, to.y);
  context.stroke();
}
function finish() {
  if (marking()) {
    const mask = document.createElement("canvas");
    mask.width = mask.height = SIDE;
    const context = mask.getContext("2d");
    context.drawImage(marks, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, SIDE, SIDE);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, SIDE, SIDE);
    state.region = mask.toDataURL("image/png");
    say("Only the marked region may change.");
    tell("marked");
  } else {
    state.picture = picture.toDataURL("image/png");
    say("");
    tell("picked");
  }
}
const place = (event) => {
  const box = marks.getBoundingClientRect();
  return { x: ((event.clientX - box.left) * SIDE) / box.width, y: ((event.clientY - box.top) * SIDE) / box.height };
};
marks.addEventListener("pointerdown", (event) => {
  event.preventDefault();
  marks.setPointerCapture(event.pointerId);
  last = place(event);
  dot(last, last);
});
marks.addEventListener("pointermove", (event) => {
  if (!last) return;
  const now = place(event);
  dot(last, now);
  last = now;
});
for (const end of ["pointerup", "pointercancel"])
  marks.addEventListener(end, () => { if (last) { last = null; finish(); } });

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const ring = find(".pad-cursor");
function moveRing() {
  ring.style.left = `${(100 * cursor.x) / SIDE}%`;
  ring.style.top = `${(100 * cursor.y) / SIDE}%`;
}
marks.addEventListener("focus", moveRing);
marks.addEventListener("keydown", (event) => {  // arrows move, Shift with an arrow or Space draws
  const step = STEPS[event.key];
  if (!step && event.key !== " ") return;
  event.preventDefault();
  const from = { ...cursor };
  if (step) {
    cursor.x = Math.min(SIDE, Math.max(0, cursor.x + (step[0] * SIDE) / 32));
    cursor.y = Math.min(SIDE, Math.max(0, cursor.y + (step[1] * SIDE) / 32));
  }
  moveRing();
  if (!step || event.shiftKey) { dot(from, cursor); drawn = true; }
});
let drawn = false;
marks.addEventListener("keyup", (event) => {
  if (drawn && (event.key === " " || event.key === "Shift" || STEPS[event.key])) { drawn = false; finish(); }
});

// Pictures from elsewhere -----------------------------------------------------------------------
file.addEventListener("change", () => { if (file.files[0]) send(file.files[0]); file.value = ""; });
element.addEventListener("paste", (event) => {
  const found = [...event.clipboardData.items].find((one) => one.kind === "file");
  if (found) { event.preventDefault(); send(found.getAsFile()); }
});
view.addEventListener("dragover", (event) => event.preventDefault());
view.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files[0]) send(event.dataTransfer.files[0]);
});
function dark() {
  if (stream) stream.getTracks().forEach((track) => track.stop());
  stream = null;
  video.hidden = snap.hidden = true;
}
const does = {
  choose: () => file.click(),
  clear: () => { dark(); state = { picture: "", region: "" }; blank(); say(""); tell("cleared"); },
  unmark: () => { unmark(); say(""); tell("marked"); },
  camera: async () => {
    if (stream) return dark();
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      return say("There is no camera that this page may use. A browser allows it on this machine and over https.");
    }
    video.srcObject = stream;
    video.hidden = false;
    await video.play();
    snap.hidden = false;  // there is a picture to take now
    snap.focus();
  },
  snap: () => {
    const side = Math.min(video.videoWidth, video.videoHeight), still = document.createElement("canvas");
    still.width = still.height = Math.min(side, 512);
    still.getContext("2d").drawImage(
      video, (video.videoWidth - side) / 2, (video.videoHeight - side) / 2, side, side, 0, 0, still.width, still.height);
    dark();
    still.toBlob(send, "image/png");
  },
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.do) does[button.dataset.do]();
  const example = button.querySelector("img");
  if (example) {
    state = { picture: example.src, region: "" };
    unmark();
    say("");
    show(example.src, () => tell("picked"));
  }
});
blank();
