// Shows the description of the API that lies beside this folder, whatever prefix stands before both. No other server is
// asked: neither to judge the description nor for anything that it names.
SwaggerUIBundle({ url: "../openapi.json", dom_id: "#swagger-ui", validatorUrl: null, deepLinking: true });
