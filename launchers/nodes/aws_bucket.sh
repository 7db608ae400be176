#!/usr/bin/env bash
# On an EC2 instance: print the name of the bucket that launchers/aws.yaml has made for the stack
# NAME, by the instance's account and region.
#
#   aws_bucket.sh NAME
set -euo pipefail
name=${1:?the name of the stack}
service=http://169.254.169.254/latest
token=$(curl -sSf -X PUT "$service/api/token" -H 'X-aws-ec2-metadata-token-ttl-seconds: 60')
curl -sSf -H "X-aws-ec2-metadata-token: $token" "$service/dynamic/instance-identity/document" |
    python3 -c 'import json, sys
document = json.load(sys.stdin)
print(sys.argv[1], document["accountId"], document["region"], sep="-")' "$name"
