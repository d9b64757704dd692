package main

// examples are lines to type, for the help and the manual page.
var examples = map[string]string{
	"mesim attach": `mesim attach --server unix:/run/kmehsm/keysvc.sock --injection injection \
    --fixture-key fixture.key --fixture-enrolment fixture.json --count 10`,
	"mesim load": `mesim load --server https://127.0.0.1:8443 --cert hss.pem --key hss.key --ca ca.pem --duration 30s \
    --injection injection --fixture-key fixture.key --fixture-enrolment fixture.json`,
	"mesim payload": `mesim payload --imei 35209900000001 --injection injection --fixture-key fixture.key \
    --fixture-enrolment fixture.json`,
	"mesim help":       `mesim help attach`,
	"mesim completion": `. <(mesim completion bash)`,
	"mesim man":        `mesim man | man -l -`,
}
