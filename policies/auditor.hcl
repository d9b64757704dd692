# An auditor: lists and reads everything, with all versions, and changes nothing.
path "{{.Mount}}/data/*" {
  capabilities = ["read"]
}
path "{{.Mount}}/metadata/*" {
  capabilities = ["list", "read"]
}
path "{{.Mount}}/config" {
  capabilities = ["read"]
}
