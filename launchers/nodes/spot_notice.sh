#!/usr/bin/env bash
# On an EC2 spot instance: wait for the notice that it will be taken away, which comes two minutes
# before, and tell Ray. Workers of a training then write a checkpoint and go on elsewhere.
#
#   spot_notice.sh ADDRESS    of Ray's head, HOST:6379
set -euo pipefail
address=${1:?the address of the head, HOST:6379}
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launchers/nodes/environment.sh
. "$here/environment.sh"
service=http://169.254.169.254/latest

notice() {  # fails while there is none
    local token
    token=$(curl -sf -m 5 -X PUT "$service/api/token" \
        -H 'X-aws-ec2-metadata-token-ttl-seconds: 60') &&
        curl -sf -m 5 -H "X-aws-ec2-metadata-token: $token" "$service/meta-data/spot/instance-action"
}

until found=$(notice); do sleep 5; done
echo "spot instance: $found"
# Without --node-id it is this machine, which RAY_ADDRESS lets Ray find.
RAY_ADDRESS=$address ray drain-node --address="$address" --reason=DRAIN_NODE_REASON_PREEMPTION \
    --reason-message="spot instance: $found" --deadline-remaining-seconds=110
