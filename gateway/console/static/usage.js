// What tenants have used, day by day.

import { html } from "./vendor/preact-htm.js";

export const Usage = () => html``;
